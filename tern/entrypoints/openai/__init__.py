"""FastDeploy's and vLLM's name for the server's module."""
