package convert

import "github.com/gquant/gquant/core/safetensors"

// copier moves a tensor's bytes.
type copier struct {
	item     *Item
	out      *safetensors.Writer
	perChunk int64 // bytes
}

func newCopier(it *Item, w *safetensors.Writer, chunkBytes int64) *copier {
	return &copier{it, w, chunkBytes}
}

func (c *copier) chunks() int { return max(1, int((c.item.Bytes+c.perChunk-1)/c.perChunk)) }

func (c *copier) open() error { return nil }

func (c *copier) run(chunk int, s *scratch) error {
	first := int64(chunk) * c.perChunk
	buffer := s.worker.Source(min(c.perChunk, c.item.Bytes-first))
	if err := c.item.entry.Read(buffer, first); err != nil {
		return err
	}
	return c.out.WriteAt(c.item.first, buffer, first)
}

func (c *copier) finish() error { return nil }
