"""Frameworks that nbnorm plugs into, one module each; none is imported unless asked for."""
