"""People label pictures: a queue, a page to draw in, agreement, review and export."""
