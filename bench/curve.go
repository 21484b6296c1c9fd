// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// curve is time and memory of slipway against the size of its input.
type curve struct {
	name, about string
	// unit is what is counted on the axis: "files".
	unit string
	// sizes go up.
	sizes []int
	// series makes ready what is measured at a size, each under the name of its line. Lines must be the same at every size.
	series func(ctx context.Context, b *bench, o *slipway, n int) ([]*contestant, error)
}

// curveRuns is how often each point is measured, after one warm-up.
const curveRuns = 3

// curves are all there are, in the order of the page.
var curves = []*curve{filesCurve, stepsCurve, layersCurve, stagesCurve, recordsCurve}

func curveNames() []string {
	var out []string
	for _, c := range curves {
		out = append(out, c.name)
	}
	return out
}

// line is one series of a curve, measured.
type line struct {
	Name   string  `json:"name"`
	Points []point `json:"points"`
}

// point is what a size takes.
type point struct {
	Size int `json:"size"`
	measured
}

// drawn is a measured curve.
type drawn struct {
	curve           *curve
	load, loadAfter string
	Lines           []*line `json:"lines"`
}

// draw measures a curve.
func (b *bench) draw(ctx context.Context, c *curve) (_ *drawn, err error) {
	d := &drawn{curve: c, load: loadAverage()}
	for _, n := range c.sizes {
		fmt.Fprintf(os.Stderr, "bench: curve %s, %d\n", c.name, n)
		if err := b.drawAt(ctx, d, n); err != nil {
			return nil, fmt.Errorf("%d %s: %w", n, c.unit, err)
		}
	}
	d.loadAfter = loadAverage()
	return d, nil
}

func (b *bench) drawAt(ctx context.Context, d *drawn, n int) (err error) {
	if err := b.enter(ctx, fmt.Sprintf("curve-%s-%d", d.curve.name, n), ""); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.leave()) }()
	all, err := d.curve.series(ctx, b, b.peers[0].(*slipway), n)
	defer func() {
		for _, c := range all {
			if c.close != nil {
				err = errors.Join(err, c.close())
			}
		}
	}()
	if err != nil {
		return err
	}
	unix.Sync()
	for i, c := range all {
		p := point{Size: n, measured: measured{Name: c.name, ours: true}}
		for round := warmUpRound; round <= curveRuns; round++ {
			if !p.wants(round, curveRuns) {
				continue
			}
			s, peak, err := b.once(ctx, c, p.watches(round, curveRuns))
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			s.Round = round
			p.add(s, peak, round, curveRuns)
		}
		if len(d.Lines) <= i {
			d.Lines = append(d.Lines, &line{Name: c.name})
		}
		d.Lines[i].Points = append(d.Lines[i].Points, p)
	}
	return nil
}

// exponent is the k of the size^k that fits the points best: the slope of the line through their logarithms by least squares.
func exponent(points []point, value func(point) float64) float64 {
	var sx, sy, sxx, sxy float64
	for _, p := range points {
		x, y := math.Log(float64(p.Size)), math.Log(value(p))
		sx, sy, sxx, sxy = sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	n := float64(len(points))
	return (n*sxy - sx*sy) / (n*sxx - sx*sx)
}

func pointTime(p point) float64   { return median(p.quantities(wall)) }
func pointMemory(p point) float64 { return float64(max(p.PeakMemory, 1)) / 1e6 }

// plotName is the file of a curve's picture.
func (d *drawn) plotName() string { return "curve-" + d.curve.name + ".svg" }

// table is the curve's part of the page, in Markdown.
func (d *drawn) table() string {
	var w strings.Builder
	fmt.Fprintf(&w, "\n## Curve: %s\n\n%s\n\n| %s |", d.curve.name, d.curve.about, d.curve.unit)
	for _, l := range d.Lines {
		fmt.Fprintf(&w, " %s: median (min–max) | peak MB |", l.Name)
	}
	w.WriteString("\n|---|" + strings.Repeat("---|---|", len(d.Lines)) + "\n")
	for i, n := range d.curve.sizes {
		fmt.Fprintf(&w, "| %d |", n)
		for _, l := range d.Lines {
			p := l.Points[i]
			times := p.quantities(wall)
			fmt.Fprintf(&w, " %s (%s–%s) | %.0f |", seconds(median(times)), seconds(times[0]), seconds(times[len(times)-1]), pointMemory(p))
		}
		w.WriteString("\n")
	}
	w.WriteString("| grows as size to the power of |")
	for _, l := range d.Lines {
		fmt.Fprintf(&w, " %.2f | %.2f |", exponent(l.Points, pointTime), exponent(l.Points, pointMemory))
	}
	fmt.Fprintf(&w, "\n\n![%s](%s)\n\n%d runs for each point; load average %s before, %s after.\n", d.curve.name, d.plotName(), curveRuns, d.load, d.loadAfter)
	return w.String()
}
