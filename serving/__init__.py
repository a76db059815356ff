"""The server: gRPC on ONNX Runtime, with the recurrent state of every caller held in a pool."""
