"""Which dense layers can be sliced over ranks, proven and applied."""
