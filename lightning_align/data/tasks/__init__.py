"""Small synthetic tasks with known right answers, to measure exactly what a method learns."""
