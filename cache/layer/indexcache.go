// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"container/list"
	"sync"

	"github.com/seed-68981b69/slipway/cache/index"
)

// indexCache keeps the most recently used indexes in memory, at most limit entries altogether (but always one).
type indexCache struct {
	limit int

	mu      sync.Mutex // guards what follows
	entries int
	byID    map[ID]*list.Element
	recent  list.List // of *cachedIndex, most recent first
}

type cachedIndex struct {
	id ID
	x  *index.Index
}

func (c *indexCache) get(id ID) *index.Index {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.byID[id]
	if el == nil {
		return nil
	}
	c.recent.MoveToFront(el)
	return el.Value.(*cachedIndex).x
}

func (c *indexCache) put(id ID, x *index.Index) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(id)
	if c.byID == nil {
		c.byID = map[ID]*list.Element{}
	}
	c.byID[id] = c.recent.PushFront(&cachedIndex{id, x})
	c.entries += x.Len()
	for c.entries > c.limit && c.recent.Len() > 1 {
		c.remove(c.recent.Back().Value.(*cachedIndex).id)
	}
}

func (c *indexCache) drop(id ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(id)
}

func (c *indexCache) remove(id ID) {
	if el := c.byID[id]; el != nil {
		c.entries -= el.Value.(*cachedIndex).x.Len()
		c.recent.Remove(el)
		delete(c.byID, id)
	}
}
