package cuda

import "testing"

func TestHopperPlan(t *testing.T) {
	d := &Device{clusters: [maxCluster + 1]int64{2: 66, 3: 42, 4: 31, 8: 15}}
	d.about.major, d.about.multiprocessors = 9, 132
	for _, c := range []struct {
		way                  Way
		n, k, m              int64
		ctas, cluster, dealt int64
	}{
		{Way{Tokens: 64}, 3072, 3072, 64, 24, 1, 0},
		{Way{Tokens: 64, Deal: 1}, 3072, 3072, 64, 132, 1, 24},
		{Way{Tokens: 64, Split: 4}, 3072, 3072, 64, 96, 4, 0},
		{Way{Tokens: 64, Split: 4}, 3072, 3072, 65, 132, 1, 48}, // there are 31 clusters for 48 tiles
		{Way{Tokens: 64, Split: 8}, 1024, 256, 64, 16, 2, 0},    // of a tile with two steps
		{Way{Tokens: 64, Tall: 192, Split: 3}, 3072, 3072, 64, 48, 3, 0},
		{Way{Tokens: 64, Split: 5}, 3072, 3072, 64, 132, 1, 24}, // the device has none of 5
	} {
		p := hopper{}.plan(d, c.way, Linear{M: c.m, N: c.n, K: c.k})
		if p.ctas != c.ctas || p.cluster != c.cluster || p.dealt != c.dealt || (p.bytes() > 0) != (c.dealt > 0) {
			t.Errorf("%v, %d×%d, %d rows: %+v, want %d CTAs in clusters of %d, %d tiles dealt out", c.way, c.n, c.k, c.m, p, c.ctas, c.cluster, c.dealt)
		}
		for _, l := range []Linear{{}, {Workspace: 16, WorkspaceBytes: p.bytes() - min(p.bytes(), 1)}, {Workspace: 8, WorkspaceBytes: p.bytes()}} {
			l.M, l.N, l.K = c.m, c.n, c.k
			if least := (hopper{}).within(d, c.way, l); least.bytes() > 0 || least.cluster != c.cluster || least.tiles != p.tiles {
				t.Errorf("%v, %d×%d, %d rows with a workspace of %d bytes at %d: %+v", c.way, c.n, c.k, c.m, l.WorkspaceBytes, l.Workspace, least)
			}
		}
		if all := (hopper{}).within(d, c.way, Linear{M: c.m, N: c.n, K: c.k, Workspace: 16, WorkspaceBytes: p.bytes()}); all != p {
			t.Errorf("%v, %d×%d, %d rows with all workspace: %+v, want %+v", c.way, c.n, c.k, c.m, all, p)
		}
	}
}
