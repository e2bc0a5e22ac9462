"""Pictures and pages for people: overlays, sheets, the self-contained HTML report."""
