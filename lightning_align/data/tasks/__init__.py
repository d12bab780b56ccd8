"""Small synthetic tasks whose right answers are known, so that what a method learns can be measured exactly."""
