"""What joins hf_paged to other libraries."""
