// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strconv"
	"strings"
)

// The picture of a curve: two panels side by side, time and memory, both axes logarithmic. Lengths are in SVG's user units.
const (
	panelWidth, panelHeight             = 360, 260
	panelLeft, panelTop, panelGap       = 60, 40, 80
	plotWidth                           = panelLeft + 2*panelWidth + panelGap + 20
	plotHeight                          = panelTop + panelHeight + 50
	plotFont                            = `font-family="sans-serif" font-size="12"`
	gridColor, axisColor                = "#ddd", "#444"
	legendLine, legendLeft, legendInner = 16, 10, 22
)

var lineColors = []string{"#1b6ca8", "#c8553d", "#3a7d44", "#7d4f9e"}

// svg draws the curve.
func (d *drawn) svg() string {
	var w strings.Builder
	fmt.Fprintf(&w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d">`+"\n", plotWidth, plotHeight, plotWidth, plotHeight)
	fmt.Fprintf(&w, `<rect width="%d" height="%d" fill="white"/>`+"\n", plotWidth, plotHeight)
	d.panel(&w, panelLeft, "seconds", pointTime)
	d.panel(&w, panelLeft+panelWidth+panelGap, "peak memory, MB", pointMemory)
	w.WriteString("</svg>\n")
	return w.String()
}

// panel draws one quantity at the horizontal place left.
func (d *drawn) panel(w *strings.Builder, left int, title string, value func(point) float64) {
	var xs, ys []float64
	for _, l := range d.Lines {
		for _, p := range l.Points {
			xs, ys = append(xs, float64(p.Size)), append(ys, value(p))
		}
	}
	x, y := axisOf(xs, float64(left), panelWidth), axisOf(ys, panelTop+panelHeight, -panelHeight)
	text := func(px, py float64, anchor, s string) {
		fmt.Fprintf(w, `<text x="%.1f" y="%.1f" text-anchor="%s" %s>%s</text>`+"\n", px, py, anchor, plotFont, html.EscapeString(s))
	}
	stroke := func(x1, y1, x2, y2 float64, color string) {
		fmt.Fprintf(w, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`+"\n", x1, y1, x2, y2, color)
	}
	bottom, right := float64(panelTop+panelHeight), float64(left+panelWidth)
	for _, t := range x.ticks() {
		stroke(x.at(t), panelTop, x.at(t), bottom, gridColor)
		text(x.at(t), bottom+16, "middle", short(t))
	}
	for _, t := range y.ticks() {
		stroke(float64(left), y.at(t), right, y.at(t), gridColor)
		text(float64(left)-6, y.at(t)+4, "end", short(t))
	}
	stroke(float64(left), panelTop, float64(left), bottom, axisColor)
	stroke(float64(left), bottom, right, bottom, axisColor)
	text(float64(left)+panelWidth/2, panelTop-14, "middle", title)
	text(float64(left)+panelWidth/2, bottom+36, "middle", d.curve.unit)
	for i, l := range d.Lines {
		color := lineColors[i%len(lineColors)]
		var points []string
		for _, p := range l.Points {
			px, py := x.at(float64(p.Size)), y.at(value(p))
			points = append(points, fmt.Sprintf("%.1f,%.1f", px, py))
			fmt.Fprintf(w, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", px, py, color)
		}
		fmt.Fprintf(w, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), color)
		ly := float64(panelTop + legendLine*(i+1))
		stroke(float64(left+legendLeft), ly-4, float64(left+legendLeft+legendInner-4), ly-4, color)
		text(float64(left+legendLeft+legendInner), ly, "start", fmt.Sprintf("%s: size^%.2f", l.Name, exponent(l.Points, value)))
	}
}

// axis is a logarithmic one.
type axis struct {
	low, high   float64 // logarithms to the base of ten
	start, span float64 // on the picture
}

// axisOf makes an axis for values, which are positive, with a little room at both ends.
func axisOf(values []float64, start, span float64) axis {
	a := axis{math.Log10(slices.Min(values)), math.Log10(slices.Max(values)), start, span}
	room := max((a.high-a.low)*0.06, 0.05)
	a.low, a.high = a.low-room, a.high+3*room // the legend stands at the top
	return a
}

func (a axis) at(v float64) float64 {
	return a.start + a.span*(math.Log10(v)-a.low)/(a.high-a.low)
}

// ticks are the powers of ten of the axis, with two and five times them when those are few.
func (a axis) ticks() []float64 {
	var out []float64
	steps := []float64{1}
	if a.high-a.low < 2.5 {
		steps = []float64{1, 2, 5}
	}
	for e := math.Floor(a.low); e <= math.Ceil(a.high); e++ {
		for _, s := range steps {
			if v := s * math.Pow(10, e); math.Log10(v) >= a.low && math.Log10(v) <= a.high {
				out = append(out, v)
			}
		}
	}
	return out
}

// short prints a number of an axis.
func short(v float64) string {
	switch {
	case v >= 1e6:
		return strconv.FormatFloat(v/1e6, 'g', 3, 64) + "M"
	case v >= 1e3:
		return strconv.FormatFloat(v/1e3, 'g', 3, 64) + "k"
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}
