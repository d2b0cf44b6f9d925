"""Folders of labelled photos as label tools write them, and COCO's format made of each."""
