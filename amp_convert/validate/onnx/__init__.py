"""ONNX Runtime: `ConvertedModel` and its file -> `OnnxParity`."""
