//! The catalogue of kernels is about every kernel that there is. (That it has every instance that the anchor models' plans pick is a test of
//! crate testkit, which knows the models.)

use std::collections::BTreeSet;

use bitfast_cuda::catalogue::kernels;

/// A file that nobody compiles without a GPU would break unseen; a name without a file cannot be.
#[test]
fn every_kernel_file_is_in_the_catalogue() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let files = std::fs::read_dir(folder).expect("a folder").map(|file| file.expect("a file").path());
    let files: BTreeSet<String> = files
        .filter(|file| file.extension().is_some_and(|e| e == "cu"))
        .filter_map(|file| Some(file.file_stem()?.to_str()?.to_owned()))
        .collect();
    let compiled: BTreeSet<String> = kernels().iter().map(|kernel| kernel.name.to_owned()).collect();
    assert_eq!(files, compiled);
}
