"""Documents that several authorised peers write: pycrdt above signed slots."""
