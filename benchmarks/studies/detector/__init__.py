"""What a detector trained on injected damage finds on pictures, and on kinds of damage, that it never saw."""
