"""Which methods the paper recommends for a problem."""
