"""Contrastive pre-training of pictures and captions: CLIP, with several captions a picture LaCLIP."""
