"""The retrieval room: documents become chunks, vectors, an index and neighbors, each stage crash-safe and found again.

It knows neither data sources nor models: those come in through the protocols `DocumentSource`, `ChunkTokenizer` (chunks)
and `Encoder` (encoders). What comes out is a folder that `RetrievalDatabase` (database) opens.
"""
