"""What the model will see of a data set: augmented images, their boxes, and their captions."""
