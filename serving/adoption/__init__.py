"""From somebody's ONNX file to a model that is served: what it is, whether it holds, its folder."""
