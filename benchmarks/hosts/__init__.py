"""Host frameworks, each with its own batch norm and with nbnorm's."""
