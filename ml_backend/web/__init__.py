"""The status page at the backend's own address: what is served, how it came to be, what failed."""
