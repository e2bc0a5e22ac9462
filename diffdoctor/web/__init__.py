"""Pages that this program serves to people's browsers: who may ask, what is read of a request, running a server."""
