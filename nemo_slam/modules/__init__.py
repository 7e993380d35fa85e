"""The parts of the model: encoders, Conformer layers over packed rows, attention, quantizer."""
