"""How well edits do: published edit sets, scores, and the methods that ours is compared with."""
