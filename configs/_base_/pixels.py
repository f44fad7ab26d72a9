# Mean and standard deviation of the pixels, R, G, B in 0 to 255.

encoder_pixels = dict(  # the encoders' own: EncoderConfig.mean and std
    mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], bgr_to_rgb=True)
detector_pixels = dict(  # of the released Mask R-CNN detectors: variants.DETECTOR_PIXELS
    mean=[127.0, 127.0, 127.0], std=[127.0, 127.0, 127.0], bgr_to_rgb=True)
