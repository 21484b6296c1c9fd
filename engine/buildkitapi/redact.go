// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	bkclient "github.com/moby/buildkit/client"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// redactStatus changes all words of an event.
func redactStatus(s *bkclient.SolveStatus, redact func(string) string) {
	for _, v := range s.Vertexes {
		v.Name, v.Error = redact(v.Name), redact(v.Error)
	}
	for _, st := range s.Statuses {
		st.ID, st.Name = redact(st.ID), redact(st.Name)
	}
	for _, l := range s.Logs {
		l.Data = []byte(redact(string(l.Data)))
	}
	for _, w := range s.Warnings {
		w.Short, w.URL = []byte(redact(string(w.Short))), redact(w.URL)
		for i := range w.Detail {
			w.Detail[i] = []byte(redact(string(w.Detail[i])))
		}
	}
}

// redactError changes the words of an error and of its details: stacks, vertices, the operation with its environment. The lines of the
// Dockerfile, which are bytes there, are as they are.
func redactError(st *spb.Status, redact func(string) string) {
	st.Message = redact(st.Message)
	for _, d := range st.Details {
		m, err := d.UnmarshalNew()
		if err != nil {
			d.Value = []byte(redact(string(d.Value))) // BuildKit's errors of other kinds are JSON
			continue
		}
		redactStrings(m.ProtoReflect(), redact)
		if data, err := proto.Marshal(m); err == nil {
			d.Value = data
		}
	}
}

// redactStrings changes every string in a message, at any depth.
func redactStrings(m protoreflect.Message, redact func(string) string) {
	value := func(kind protoreflect.Kind, v protoreflect.Value) (protoreflect.Value, bool) {
		switch kind {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(redact(v.String())), true
		case protoreflect.MessageKind, protoreflect.GroupKind:
			redactStrings(v.Message(), redact)
		}
		return v, false
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			v.Map().Range(func(k protoreflect.MapKey, item protoreflect.Value) bool {
				if changed, ok := value(f.MapValue().Kind(), item); ok {
					v.Map().Set(k, changed)
				}
				return true
			})
		case f.IsList():
			for i := range v.List().Len() {
				if changed, ok := value(f.Kind(), v.List().Get(i)); ok {
					v.List().Set(i, changed)
				}
			}
		default:
			if changed, ok := value(f.Kind(), v); ok {
				m.Set(f, changed)
			}
		}
		return true
	})
}
