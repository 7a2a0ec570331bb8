"""Host frameworks, each with its own batch norm and nbnorm's."""
