// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import "time"

// SetTiming makes the times short after which a slow way is given up, and failing ones are tried
// again.
func (s *Substituter) SetTiming(slow, silence, round, rounds time.Duration) {
	s.timing = timing{slow, silence, round, rounds}
}
