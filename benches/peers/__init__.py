"""pvcore beside its peers: one adapter for each, run in a process of its own."""
