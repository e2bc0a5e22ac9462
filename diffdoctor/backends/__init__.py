"""The compiled backends and the choice among them; nothing in here knows autograd."""
