// SPDX-License-Identifier: GPL-3.0-or-later

package narinfocache

// SetMost sets how many bytes the entries may take, and after about how many files that is looked
// at.
func (c *Cache) SetMost(most int64, trimEvery int) { c.most, c.trimEvery = most, trimEvery }
