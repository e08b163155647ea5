package safetensors

import "unicode/utf8"

// maxDepth is serde_json's nesting limit, which bounds the Rust reader. It keeps recursive parsers off the end of
// the stack.
const maxDepth = 128

// prescan rejects what JSON forbids but JSON libraries let through or repair: bytes that are not UTF-8, control
// characters in strings, unknown escapes, surrogates without their partner, and nesting that exhausts the stack.
// It does not check the grammar.
func prescan(b []byte) error {
	depth := 0
	for i := 0; i < len(b); {
		switch c := b[i]; {
		case c == '"':
			n, err := scanString(b, i)
			if err != nil {
				return err
			}
			i = n
			continue
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return problemAt(i, "nested deeper than %d levels", maxDepth)
			}
		case c == '}' || c == ']':
			depth--
		case c >= utf8.RuneSelf:
			return problemAt(i, "byte 0x%02x outside a string", c)
		}
		i++
	}
	return nil
}

// scanString checks the string that opens at b[start] and returns the index behind its closing quote.
func scanString(b []byte, start int) (int, error) {
	for i := start + 1; i < len(b); {
		switch c := b[i]; {
		case c == '"':
			return i + 1, nil
		case c == '\\':
			n, err := scanEscape(b, i)
			if err != nil {
				return 0, err
			}
			i += n
		case c < 0x20:
			return 0, problemAt(i, "control character 0x%02x in a string; it must be escaped", c)
		case c < utf8.RuneSelf:
			i++
		default:
			r, n := utf8.DecodeRune(b[i:])
			if r == utf8.RuneError && n == 1 {
				return 0, problemAt(i, "byte 0x%02x is not valid UTF-8", c)
			}
			i += n
		}
	}
	return 0, problemAt(start, "string without an end")
}

// scanEscape checks the escape at b[i] and returns its length; a surrogate pair counts as one.
func scanEscape(b []byte, i int) (int, error) {
	if i+1 == len(b) {
		return 0, problemAt(i, "escape without an end")
	}
	switch b[i+1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2, nil
	case 'u':
	default:
		return 0, problemAt(i, "unknown escape %q", b[i:i+2])
	}
	u, ok := hex4(b, i+2)
	switch {
	case !ok:
		return 0, problemAt(i, `\u without four hexadecimal digits`)
	case u < 0xd800 || u > 0xdfff:
		return 6, nil
	case u <= 0xdbff && i+7 < len(b) && b[i+6] == '\\' && b[i+7] == 'u':
		if low, ok := hex4(b, i+8); ok && low >= 0xdc00 && low <= 0xdfff {
			return 12, nil
		}
	}
	return 0, problemAt(i, "surrogate %s without its partner", b[i:i+6])
}

func hex4(b []byte, i int) (u uint16, ok bool) {
	if i+4 > len(b) {
		return 0, false
	}
	for _, c := range b[i : i+4] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		u = u<<4 | uint16(c)
	}
	return u, true
}
