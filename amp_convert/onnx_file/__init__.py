"""`ConvertedModel` -> an ONNX file with the precision of the plan."""
