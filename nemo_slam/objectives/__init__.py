"""The objectives of SLAM: each says what it masks, which sequences it adds to a step, and its loss."""
