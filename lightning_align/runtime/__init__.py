"""Ranks, files, memory, the hub, and what is used of Lightning beyond its public interface."""
