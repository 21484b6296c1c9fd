// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// libseccomp compiles a profile in 12 ms, mostly because it copies its whole database for each of the 380 rules, and
// libcontainer has it done anew in every container. The same profile serves thousands of steps, so it is compiled here
// once. The program answers as libcontainer's does (TestFilterAgrees compares the two, syscall by syscall): another
// architecture is killed, a syscall newer than all that the profile knows gets ENOSYS, everything else what the
// profile says. It is smaller, because neighbours with the same answer are one range of a binary search.

// What a filter returns to the kernel, from <linux/seccomp.h>.
const (
	retKillProcess = 0x80000000
	retKillThread  = 0
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000
)

// Offsets in struct seccomp_data.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

// x32Bit marks the calls of 32-bit programs in 64-bit mode.
const x32Bit = 0x40000000

// maxFilterLength is the kernel's BPF_MAXINSNS.
const maxFilterLength = 4096

// filterRule is one way of a syscall to get an answer other than the profile's default.
type filterRule struct {
	nr     uint32
	conds  []specs.LinuxSeccompArg // all must hold
	action uint32
}

// compileFilter turns a profile into a BPF program and the flags to load it with. It refuses what the default profile
// has no use for (several architectures, notification, tracing); libcontainer can do that.
func compileFilter(p *specs.LinuxSeccomp) (program []unix.SockFilter, flags uint, err error) {
	arch, err := auditArch(p.Architectures)
	if err != nil {
		return nil, 0, err
	}
	flags = unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW // as libcontainer does when nothing is said
	if p.Flags != nil {
		flags = 0
		for _, f := range p.Flags {
			switch f {
			case specs.LinuxSeccompFlagLog:
				flags |= unix.SECCOMP_FILTER_FLAG_LOG
			case specs.LinuxSeccompFlagSpecAllow:
				flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
			default:
				return nil, 0, fmt.Errorf("seccomp flag %s", f)
			}
		}
	}
	def, err := filterAction(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, 0, err
	}
	if def&0xffff0000 != retErrno {
		return nil, 0, fmt.Errorf("seccomp default action %s", p.DefaultAction)
	}
	rules, last, err := filterRules(p, def)
	if err != nil {
		return nil, 0, err
	}
	program = []unix.SockFilter{
		load(offArch),
		jump(unix.BPF_JEQ, arch, 1, 0),
		ret(retKillThread),
		load(offNr),
	}
	if arch == unix.AUDIT_ARCH_X86_64 {
		// The x32 variant of the calls; -1 is what a tracer makes of a call that is to be skipped.
		program = append(program,
			jump(unix.BPF_JSET, x32Bit, 0, 3),
			jump(unix.BPF_JEQ, ^uint32(0), 1, 0),
			ret(retKillThread),
			ret(def),
		)
	}
	program = append(program, search(segments(rules, last, def))...)
	if len(program) > maxFilterLength {
		return nil, 0, fmt.Errorf("seccomp filter of %d instructions", len(program))
	}
	return program, flags, nil
}

// auditArch returns the kernel's number of this machine's architecture, if a profile is for that one alone.
func auditArch(archs []specs.Arch) (uint32, error) {
	native := map[string]struct {
		arch  specs.Arch
		audit uint32
	}{
		"amd64":   {specs.ArchX86_64, unix.AUDIT_ARCH_X86_64},
		"arm64":   {specs.ArchAARCH64, unix.AUDIT_ARCH_AARCH64},
		"riscv64": {specs.ArchRISCV64, unix.AUDIT_ARCH_RISCV64},
	}[runtime.GOARCH]
	if native.audit == 0 || len(archs) != 1 || archs[0] != native.arch {
		return 0, fmt.Errorf("seccomp architectures %v", archs)
	}
	return native.audit, nil
}

func filterAction(a specs.LinuxSeccompAction, errnoRet *uint) (uint32, error) {
	switch a {
	case specs.ActAllow:
		return retAllow, nil
	case specs.ActErrno:
		if errnoRet == nil {
			return retErrno | uint32(unix.EPERM), nil
		}
		return retErrno | uint32(*errnoRet)&0xffff, nil
	case specs.ActKill, specs.ActKillThread:
		return retKillThread, nil
	case specs.ActKillProcess:
		return retKillProcess, nil
	case specs.ActTrap:
		return retTrap, nil
	case specs.ActLog:
		return retLog, nil
	}
	return 0, fmt.Errorf("seccomp action %s", a)
}

// operators are those that condition knows.
var operators = []specs.LinuxSeccompOperator{
	specs.OpEqualTo, specs.OpNotEqual, specs.OpMaskedEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpLessThan, specs.OpLessEqual,
}

// filterRules flattens a profile into rules, sorted by syscall, and returns the highest syscall that it names. Names
// that this architecture does not have are left out, as libcontainer does.
func filterRules(p *specs.LinuxSeccomp, def uint32) (rules []filterRule, last uint32, err error) {
	for _, call := range p.Syscalls {
		action, err := filterAction(call.Action, call.ErrnoRet)
		if err != nil {
			return nil, 0, err
		}
		perArg := map[uint]int{}
		for _, a := range call.Args {
			perArg[a.Index]++
			if a.Index > 5 || !slices.Contains(operators, a.Op) || a.Op == specs.OpMaskedEqual && a.ValueTwo&^a.Value != 0 {
				return nil, 0, fmt.Errorf("seccomp condition %+v", a)
			}
			if perArg[a.Index] > 1 { // libcontainer makes alternatives of them: not worth following
				return nil, 0, fmt.Errorf("two seccomp conditions on one argument")
			}
		}
		for _, name := range call.Names {
			nr, ok, err := syscallNumber(name)
			if err != nil {
				return nil, 0, err
			}
			if !ok {
				continue
			}
			last = max(last, nr)
			if action != def {
				rules = append(rules, filterRule{nr: nr, conds: call.Args, action: action})
			}
		}
	}
	slices.SortStableFunc(rules, func(a, b filterRule) int { return cmp.Compare(a.nr, b.nr) })
	for i := 1; i < len(rules); i++ {
		if rules[i].nr == rules[i-1].nr && rules[i].action != rules[i-1].action {
			return nil, 0, fmt.Errorf("different seccomp actions for syscall %d", rules[i].nr)
		}
	}
	return rules, last, nil
}

// segment is what happens to the syscalls up to and including one, from where the segment before it ends.
type segment struct {
	upTo uint32
	code []unix.SockFilter
}

// segments are the answers to all syscalls in order of their numbers, neighbours with the same answer taken together.
func segments(rules []filterRule, last, def uint32) []segment {
	var list []segment
	add := func(upTo uint32, code []unix.SockFilter) {
		if n := len(list); n > 0 && slices.Equal(list[n-1].code, code) {
			list[n-1].upTo = upTo
			return
		}
		list = append(list, segment{upTo, code})
	}
	next := uint32(0)
	for len(rules) > 0 {
		nr := rules[0].nr
		n := slices.IndexFunc(rules, func(r filterRule) bool { return r.nr != nr })
		if n < 0 {
			n = len(rules)
		}
		if nr > next {
			add(nr-1, []unix.SockFilter{ret(def)})
		}
		add(nr, answer(rules[:n], def))
		rules, next = rules[n:], nr+1
	}
	if next <= last {
		add(last, []unix.SockFilter{ret(def)})
	}
	add(^uint32(0), []unix.SockFilter{ret(retErrno | uint32(unix.ENOSYS))})
	return list
}

// answer is the code for one syscall with its rules: the first one whose conditions all hold says what happens.
func answer(rules []filterRule, def uint32) []unix.SockFilter {
	if slices.ContainsFunc(rules, func(r filterRule) bool { return len(r.conds) == 0 }) {
		return []unix.SockFilter{ret(rules[0].action)}
	}
	var code []unix.SockFilter
	for _, r := range rules {
		body := []unix.SockFilter{ret(r.action)}
		for _, c := range slices.Backward(r.conds) {
			body = append(condition(c, uint8(len(body))), body...)
		}
		code = append(code, body...)
	}
	return append(code, ret(def))
}

// condition falls through when c holds and otherwise skips the next rest instructions. Arguments are 64 bits wide and
// registers 32: the upper half is looked at first.
func condition(c specs.LinuxSeccompArg, rest uint8) []unix.SockFilter {
	lowOff := uint32(offArgs + 8*c.Index)
	highOff := lowOff + 4
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		lowOff, highOff = highOff, lowOff
	}
	high, low := uint32(c.Value>>32), uint32(c.Value)
	switch c.Op {
	case specs.OpMaskedEqual:
		mask := func(v uint64) (uint32, uint32) { return uint32(v >> 32), uint32(v) }
		maskHigh, maskLow := mask(c.Value)
		high, low = mask(c.ValueTwo)
		return []unix.SockFilter{
			load(highOff), and(maskHigh), jump(unix.BPF_JEQ, high, 0, rest+3),
			load(lowOff), and(maskLow), jump(unix.BPF_JEQ, low, 0, rest),
		}
	case specs.OpNotEqual:
		return []unix.SockFilter{load(highOff), jump(unix.BPF_JEQ, high, 0, 2), load(lowOff), jump(unix.BPF_JEQ, low, rest, 0)}
	case specs.OpGreaterThan:
		return []unix.SockFilter{
			load(highOff), jump(unix.BPF_JGT, high, 3, 0), jump(unix.BPF_JEQ, high, 0, rest+2),
			load(lowOff), jump(unix.BPF_JGT, low, 0, rest),
		}
	case specs.OpGreaterEqual:
		return []unix.SockFilter{
			load(highOff), jump(unix.BPF_JGT, high, 3, 0), jump(unix.BPF_JEQ, high, 0, rest+2),
			load(lowOff), jump(unix.BPF_JGE, low, 0, rest),
		}
	case specs.OpLessThan:
		return []unix.SockFilter{
			load(highOff), jump(unix.BPF_JGT, high, rest+3, 0), jump(unix.BPF_JEQ, high, 0, 2),
			load(lowOff), jump(unix.BPF_JGE, low, rest, 0),
		}
	case specs.OpLessEqual:
		return []unix.SockFilter{
			load(highOff), jump(unix.BPF_JGT, high, rest+3, 0), jump(unix.BPF_JEQ, high, 0, 2),
			load(lowOff), jump(unix.BPF_JGT, low, rest, 0),
		}
	default: // OpEqualTo
		return []unix.SockFilter{
			load(highOff), jump(unix.BPF_JEQ, high, 0, rest+2),
			load(lowOff), jump(unix.BPF_JEQ, low, 0, rest),
		}
	}
}

// search is a binary search for the segment of the syscall whose number is in the register.
func search(list []segment) []unix.SockFilter {
	if len(list) == 1 {
		return list[0].code
	}
	middle := (len(list) - 1) / 2
	below, above := search(list[:middle+1]), search(list[middle+1:])
	var code []unix.SockFilter
	if len(below) <= 255 {
		code = []unix.SockFilter{jump(unix.BPF_JGT, list[middle].upTo, uint8(len(below)), 0)}
	} else {
		code = []unix.SockFilter{
			jump(unix.BPF_JGT, list[middle].upTo, 0, 1),
			{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(len(below))},
		}
	}
	return append(append(code, below...), above...)
}

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

func and(mask uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: mask}
}

func jump(op uint16, k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, Jt: yes, Jf: no, K: k}
}

func ret(action uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
}
