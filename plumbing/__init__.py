"""Nothing of the paper: what the scripts need besides, each file to be read alone.

options     the command line, and one line for every user error
files       whole files or none: tensors, JSON, CSV, pictures
devices     device, precision, processes
optim       AdamW, clipping, fp16's loss scale, averages, schedules
pairs       the pairs on disk, and what is drawn at random
rundir      what a run leaves: log, curves, checkpoints; signals
edm_files   EDM's files, without running what they say
downloads   weights by name or address
fid         the Frechet Inception Distance by EDM's protocol
digits      MNIST, and the classifiers that judge digits
captions    pictures of captions, their FID and CLIP score
"""
