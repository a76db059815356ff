"""The Open Inference Protocol, generated from proto/tenuto/oip."""
