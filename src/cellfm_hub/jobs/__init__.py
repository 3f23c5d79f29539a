"""Long runs over files: in parts that are kept, resumed, shared out among devices and machines, and put together."""
