"""Reference policies: frozen, adapters off, stored, moving."""
