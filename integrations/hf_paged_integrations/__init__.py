"""hf_paged in other libraries: the hooks in transformers, pipelines, servers."""
