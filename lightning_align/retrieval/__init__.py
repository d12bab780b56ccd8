"""Retrieval databases: documents become chunks, vectors, an index and neighbors. Each stage can be stopped and resumed.

This folder imports no data source and no model. Callers pass them in through the protocols `DocumentSource`,
`ChunkTokenizer` (both in ``chunks.py``) and `Encoder` (``encoders.py``). The result is a folder that `RetrievalDatabase`
(``database.py``) opens.
"""
