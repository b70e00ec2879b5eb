"""UltraEdit inside a running vLLM server (vLLM 0.32 or newer)."""
