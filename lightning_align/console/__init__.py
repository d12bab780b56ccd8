"""What surrounds the command line: shipped configurations, errors of the parser, the progress bar, help pages."""
