"""The Open Inference Protocol over the same engines: tritonclient's and KServe's language, docs/oip.md."""
