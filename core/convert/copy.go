package convert

import "github.com/gquant/gquant/core/safetensors"

// copier moves a tensor's bytes.
type copier struct {
	item *Item
	out  *safetensors.Writer
}

func newCopier(it *Item, w *safetensors.Writer) *copier { return &copier{it, w} }

func (c *copier) chunks() int { return max(1, int((c.item.Bytes+chunkBytes-1)/chunkBytes)) }

func (c *copier) open() error { return nil }

func (c *copier) run(chunk int, s *scratch) error {
	first := int64(chunk) * chunkBytes
	buffer := grow(&s.in, min(chunkBytes, c.item.Bytes-first))
	if err := c.item.entry.Read(buffer, first); err != nil {
		return err
	}
	return c.out.WriteAt(c.item.first, buffer, first)
}

func (c *copier) finish() error { return nil }
