"""Every option once, with its unit and the reason for its value; other configs change a few.

A value is set on the command line by its path: `--config.model.width=16`. An option that is not
listed here is refused, and so is a value of another type.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Returns the options that all configs start from: 256x256 images on an accelerator."""
    config = ConfigDict()

    # Data.
    # "folder" reads the images of data_dir directly; "mvtec_ad" and "synthetic_ad" are the TFDS
    # builders in data/ and train from the copy that TFDS prepares.
    config.dataset = "folder"
    # The folder that holds the category folders (for "mvtec_ad": TFDS's manual folder).
    config.data_dir = ""
    # Where TFDS keeps what it prepares; "" is its default (~/tensorflow_datasets).
    config.tfds_dir = ""
    # One after the other; ("all",) takes every category that is there.
    config.categories = ("all",)
    # How category folders are read (dataset="folder"). "auto" is the first layout of
    # images/layouts.py that fits: mvtec_ad, mvtec_loco, mvtec_ad_2, visa, btad ...
    config.layout = "auto"
    # The mask of 000.png is 000<suffix>.png, or 000.png.
    config.mask_suffix = "_mask"
    # Pixels that count neither way: ignore.png in the category folder is for all images,
    # ground_truth/<type>/000_ignore.png or ignore/<path of the image> for one. "" reads none.
    config.ignore_name = "ignore"
    # "8", "10", "12", "14" or "16": images of more than 8 bits go from 0 to 2**bit_depth - 1 ("1":
    # float images from 0 to 1). "auto" is the smallest that holds all training images.
    config.bit_depth = "auto"
    # Larger images are refused before they are decoded.
    config.max_megapixels = 150.0
    # Height and width in pixels that images are resized to, or one number for both: multiples of
    # 2**model.depth.
    config.image_size = (256, 256)
    # Fraction of train/good that is not trained on: thresholds are made from it, without defects.
    config.held_out = 0.1

    # Training.
    config.seed = 0
    # Several seeds, for example (0, 1, 2): each in a folder of its own, then mean and spread.
    config.seeds = ()
    # "i/n": every n-th of all categories, seeds and variants, i from 0 to n-1, all commands with
    # the same --workdir; --mode=merge then merges their results. "" is all of them.
    config.shard = ""
    # Of all devices together; must be a multiple of their number, times `accumulate`.
    config.batch_size = 16
    # Parts that each device divides its share of the batch into, one after the other: a larger
    # batch in the same memory. Changes nothing but rounding; 1 is off.
    config.accumulate = 1
    # Computes what the layers put out a second time for the gradient instead of keeping it: less
    # memory, about 40 % more operations. Changes nothing but rounding.
    config.remat = False
    config.num_steps = 20_000
    # In steps. What a kill can cost at most.
    config.checkpoint_every = 1_000
    config.log_every = 50
    # A category folder of another workdir: resume from its checkpoint if this workdir has none.
    config.resume = ""
    # Adam's; falls to zero along half a cosine.
    config.learning_rate = 1e-3
    config.warmup_steps = 200
    config.weight_decay = 1e-4
    # Of the gradients of each network: anomaly head, reconstructor, discriminator, detector.
    config.clip_norm = 1.0
    # The discriminator's learning rate, relative to the generator's: a faster one wins.
    config.discriminator_scale = 0.02
    # Of the averaged weights that are evaluated: a memory of about 1 / (1 - decay) steps.
    config.ema_decay = 0.998

    # Networks (models.py).
    config.model = ConfigDict()
    # Channels at half the image's size, a multiple of 8; doubled at each halving, up to 8 times.
    config.model.width = 32
    # Halvings: one cell of the bottleneck sees at least 2**depth pixels.
    config.model.depth = 5
    # Channels of the reconstruction's bottleneck: few, so that it cannot copy a defect.
    config.model.latent = 32
    # How many of the memory bank's two scales the anomaly head sees, the finer one first. With both
    # at 128x128, where the coarser one is a blur, textures are learned by heart (configs/cpu.py).
    config.model.distance_scales = 2
    # The coordinate channels (an ablation).
    config.model.coords = True
    # "float32" or "bfloat16": of the computation; parameters and losses are always float32.
    config.model.dtype = "float32"
    # Channels of the discriminator at half the image's size, and its halvings.
    config.model.discriminator_width = 16
    config.model.discriminator_depth = 4

    # Memory bank (memory_bank.py): good patches at half the image's size and at a quarter. The
    # distances of an image's patches to the nearest of them are an input of the anomaly head, and
    # prediction adds them to the map. It also has the brightness that images are scaled to. Not
    # part of the paper's method. All values are measured (docs/lab/experiments.md).
    config.memory_bank = ConfigDict()
    # Patches at each of the two scales; 0 for no memory bank.
    config.memory_bank.size = 4000
    # Side of a patch and distance from one patch to the next, in pixels of the reduced image.
    config.memory_bank.patch = 5
    config.memory_bank.stride = 1
    # Principal components that describe a patch.
    config.memory_bank.components = 32
    # The coreset is chosen from this many candidates for each of its patches.
    config.memory_bank.candidates_per_patch = 48
    # Good images that are used: three quarters give the patches, the others calibrate distances.
    config.memory_bank.num_bank_images = 256
    # Weight of the position of a patch beside its content; 0 ignores it.
    config.memory_bank.position_weight = 3.0
    # Weights of the distances in the logits of the predicted map: half size, quarter size. At
    # 128x128 the former see what the latter see at 256x256 (configs/cpu.py).
    config.memory_bank.distance_weights = (0.25, 0.5)

    # Losses (losses.py). A weight of zero switches the adversarial or the reconstruction loss off.
    # Without both (an ablation) the generator predicts the map from the image alone.
    config.loss = ConfigDict()
    config.loss.segmentation = "focal"  # or "l1", "bce"
    config.loss.segmentation_weight = 1.0
    config.loss.reconstruction_weight = 1.0
    # With limit_adversarial, what each example's outputs learn from the discriminator is at most
    # this fraction of what a mean absolute error would teach them: it cannot run away.
    config.loss.adversarial_weight = 0.01
    config.loss.limit_adversarial = True
    # The discriminator's labels are this far from 0 and 1, or its logits would grow without bound.
    config.loss.label_smoothing = 0.1
    # Of the discriminator's slope: it keeps a discriminator that wins from growing without bound.
    # 0 switches it off.
    config.loss.gradient_penalty = 1.0

    # Image-level detector (detector.py): trained after the generator, on good images and its maps.
    # Depth, coordinates, precision and discriminator are those of config.model.
    config.detector = ConfigDict()
    config.detector.enabled = False
    config.detector.num_steps = 5_000
    config.detector.learning_rate = 1e-3
    # Channels at half the image's size, a multiple of 8, and of the bottleneck.
    config.detector.width = 32
    config.detector.latent = 32
    # Weights of its losses; the adversarial loss has the form that config.loss describes.
    config.detector.adversarial_weight = 0.01
    config.detector.reconstruction_weight = 1.0

    # Synthetic defects (defects.py).
    config.defects = ConfigDict()
    # "default": four kinds; "paper": hard augmentation alone; "plain": cut-and-paste without it (an
    # ablation).
    config.defects.preset = "default"
    # Fraction of the images that are left normal.
    config.defects.normal_fraction = 0.25
    # With preset "default": where the background is plain, defects begin on the object.
    config.defects.on_object = True
    # In all kinds, min_change is in standard deviations of a pixel's surroundings; smaller changes
    # are undone and not marked.
    paste = {
        "regions": 3,  # at most
        "area": (0.0005, 0.05),  # smallest and largest, as fractions of the image
        "aspect": 16.0,  # largest ratio of a region's sides
        "opacity": (0.3, 1.0),  # smallest and largest
        "min_change": 0.5,
    }
    config.defects.cut_and_paste = ConfigDict(paste)
    config.defects.hard_augmentation = ConfigDict(paste)
    config.defects.hard_augmentation.rotate_probability = 0.5
    config.defects.hard_augmentation.permute_probability = 0.5
    config.defects.hard_augmentation.jitter_probability = 0.5
    # Patches a side when the copy is permuted.
    config.defects.hard_augmentation.grid = 4
    # Largest relative changes, either way; hue in degrees.
    config.defects.hard_augmentation.brightness = 0.5
    config.defects.hard_augmentation.contrast = 0.5
    config.defects.hard_augmentation.saturation = 0.5
    config.defects.hard_augmentation.hue = 90.0
    # Random shapes are smooth noise cut off at `depth` standard deviations below its peak: from a
    # few pixels to islands all over; `softness` of the edges from 0 to 1.
    config.defects.foreign_texture = ConfigDict(
        {
            "depth": (0.1, 1.0),
            "softness": 0.5,
            "opacity": (0.2, 1.0),
            "brightness": 0.5,
            "min_change": 0.3,
        }
    )
    config.defects.local_change = ConfigDict(
        {
            "depth": (0.1, 2.5),  # up to half of the image: stains, a part of another colour
            "softness": 1.0,
            "amount": (0.3, 3.0),  # of tint and noise, likewise
            "radius": 3,  # of the blur, in pixels
            "min_change": 0.3,
        }
    )
    config.defects.foreign_structure = ConfigDict(
        {
            "depth": (0.1, 1.2),
            "softness": 0.7,
            "gain": (0.7, 1.5),  # of the structure's contrast
            "min_change": 0.3,
        }
    )

    # Changes that keep a good part good (augment.py). But for the light, it depends on the part.
    config.augment = ConfigDict()
    config.augment.flip_horizontal = False
    config.augment.flip_vertical = False
    config.augment.rotation = 0.0  # degrees, either way
    config.augment.shift = 0.0  # of height and width, either way
    # Of gamma and contrast, relative, either way; half of it of brightness. Photographs of one part
    # differ from day to day. Larger changes cost AP (docs/lab/experiments.md, 69 and 83).
    config.augment.light = 0.02

    # By category: options of this file that differ there, for example
    # {"screw": {"augment": {"flip_horizontal": True}}}.
    config.category_options = ConfigDict()
    # Runs that differ in some options of this file, for example {"no_coords": {"model": {"coords":
    # False}}}: each in a folder of that name, then a table of what each adds to the one before
    # (configs/ablation.py). In the order in which they are set.
    config.variants = ConfigDict(sort_keys=False)

    # Evaluation.
    config.evaluate = ConfigDict()
    config.evaluate.batch_size = 32
    # The image-level score is how far this fraction of the map's pixels, the highest ones, stands
    # out from its median.
    config.evaluate.top_fraction = 0.001
    # The score that image metrics and verdicts are of: "map", or "detector" (detector.enabled).
    config.evaluate.image_score = "map"
    # The pixel threshold is what this share of the pixels of good images reaches, the image
    # threshold what this share of good images reaches: those held out, and as many of those trained
    # on (each compared with the patches of other images; none without a memory bank) as make
    # threshold_images together.
    config.evaluate.threshold_images = 256
    config.evaluate.pixel_false_positive_rate = 0.001
    config.evaluate.image_false_positive_rate = 0.05
    # Your own thresholds instead of those from held-out images. Pixels: from 0 to 1. Images: on the
    # scale of the scores in images.csv, which are logits: often above 1.
    config.evaluate.pixel_threshold = config_dict.placeholder(float)
    config.evaluate.image_threshold = config_dict.placeholder(float)
    # Pixel metrics at the size of the mask files, maps enlarged to it, instead of image_size.
    config.evaluate.native_size = False
    # Trivial baselines (baselines.py) beside the model, from the images it was trained on.
    config.evaluate.baselines = True
    # Of each kind (best, worst, missed, false alarm); 0 writes none.
    config.evaluate.pictures = 8
    # Stores the images, masks and maps that report.html shows (evaluation.npz) of variants and of
    # all seeds, too. Otherwise only of the first seed of a run without variants.
    config.evaluate.store_all_maps = False

    # --mode=evaluate judges the anomaly maps of another method in this folder instead of a model's:
    # <category>/<defect type>/<image stem>.npy, .tiff, .tif or .png (benchmarks/peers.md).
    config.maps_dir = ""

    # Compiled programs are kept here between runs; "" keeps none.
    config.compilation_cache = "~/.cache/anoseg_jax"
    return config
