"""Plain functions of the data that every model is compared with."""
