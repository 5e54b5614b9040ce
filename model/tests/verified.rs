//! No weight is handed out, and no number of a manifest believed, that is not what it was when the store
//! was made; and whoever writes to a store in use is noticed.

#![allow(clippy::unwrap_used, reason = "a helper of tests may fail like a test")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use model::{FileWatch, Manifest, Store, StoreError, WeightFile, synth};
use proptest::prelude::*;
use tempfile::TempDir;

/// Two layers, a head that is not tied, and a vocabulary that ends inside a group of the screen.
const SHAPE: &str = "2x64x128x2x1x40";

fn make(dir: &Path) -> PathBuf {
    let dest = dir.join("store");
    synth(&SHAPE.parse().unwrap(), 3, &dest, &mut |_| {}).unwrap();
    dest
}

/// A store that no test changes.
fn original() -> &'static Path {
    static DIR: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let made = DIR.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let store = make(dir.path());
        (dir, store)
    });
    &made.1
}

fn copy_of(store: &Path, dest: &Path) {
    fs::create_dir(dest).unwrap();
    for entry in fs::read_dir(store).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dest.join(entry.file_name())).unwrap();
    }
}

/// Opens everything that a worker with all layers opens.
fn open_all(store: &Store) -> Result<(), StoreError> {
    for layer in 0..store.config().layers {
        store.layer(layer)?;
    }
    store.embedding()?;
    store.head()?;
    store.final_norm()?;
    store.screen()?;
    Ok(())
}

/// The name of a file that a refusal is about.
fn refused(error: &StoreError) -> String {
    let text = error.to_string();
    assert!(text.contains(" has hash ") || text.contains("the manifest says"), "{text}");
    let path = text.split(' ').next().unwrap();
    Path::new(path).file_name().unwrap().to_string_lossy().into_owned()
}

#[test]
fn one_bit_of_any_shard_is_refused_by_whoever_opens_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy_of(original(), &path);
    let names: Vec<String> = {
        let store = Store::open(&path).unwrap();
        open_all(&store).unwrap();
        store.manifest().files.iter().map(|file| file.name.clone()).collect()
    };
    assert!(names.len() >= 5, "{names:?}");
    for name in names {
        let file = File::options().read(true).write(true).open(path.join(&name)).unwrap();
        let bytes = file.metadata().unwrap().len();
        // The header's length, the header, its padding, the data, the end.
        for (at, bit) in [(0, 0), (20, 3), (bytes / 3, 1), (bytes / 2, 7), (bytes - 1, 5)] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
            // Both of whoever opens shards as it needs them, and of whoever verifies all at its start.
            let error = open_all(&Store::open(&path).unwrap()).unwrap_err();
            assert_eq!(refused(&error), name, "bit {bit} of byte {at}");
            let error = Store::open(&path).unwrap().verify_files(|_| {}).unwrap_err();
            assert_eq!(refused(&error), name);
            file.write_all_at(&byte, at).unwrap();
        }
        open_all(&Store::open(&path).unwrap()).unwrap();
    }
}

#[test]
fn a_number_of_the_manifest_that_is_another_is_refused() {
    let json = fs::read(original().join("manifest.json")).unwrap();
    let good = Manifest::parse(&json).unwrap();
    let mut refusals = 0;
    for at in 0..json.len() {
        for bit in 0..8 {
            let mut bad = json.clone();
            bad[at] ^= 1 << bit;
            match Manifest::parse(&bad) {
                // Spaces, and digits beyond those of an f32.
                Ok(same) => assert_eq!(same, good, "bit {bit} of byte {at}"),
                Err(_) => refusals += 1,
            }
        }
    }
    assert!(refusals > json.len() * 6, "{refusals} of {}", json.len() * 8);
}

/// A field that is added for some models must not be written for the others: the digests of stores that
/// were made before it would be wrong.
#[test]
fn what_a_store_does_not_have_is_not_in_its_manifest() {
    let json = fs::read(original().join("manifest.json")).unwrap();
    let manifest = Manifest::parse(&json).unwrap();
    let fields = |value: serde_json::Value| -> Vec<String> {
        value.as_object().unwrap().keys().cloned().collect()
    };
    let mut found = fields(serde_json::to_value(&manifest).unwrap());
    found.sort();
    let expected = [
        "bos_token_text",
        "chat_template",
        "config",
        "digest",
        "eos_token_text",
        "files",
        "format",
        "id",
        "layout",
        "provenance",
        "tokenizer",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_store_without_a_digest_is_verified_by_its_id() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy_of(original(), &path);
    let manifest = path.join("manifest.json");
    let mut old = Manifest::parse(&fs::read(&manifest).unwrap()).unwrap();
    old.digest = None;
    fs::write(&manifest, serde_json::to_vec(&old).unwrap()).unwrap();
    Store::open(&path).unwrap().verify_files(|_| {}).unwrap();
    old.config.rms_eps *= 2.0;
    fs::write(&manifest, serde_json::to_vec(&old).unwrap()).unwrap();
    let error = Store::open(&path).unwrap().verify_files(|_| {}).unwrap_err();
    assert!(matches!(error, StoreError::Id { .. }), "{error}");
}

#[test]
fn a_file_is_read_once_as_long_as_nobody_writes_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy_of(original(), &path);
    let store = Store::open(&path).unwrap();
    let read = |store: &Store| {
        let mut bytes = 0;
        store.verify_files(|report| bytes = report.done).map(|()| bytes)
    };
    let all: u64 = store.manifest().files.iter().map(|file| file.bytes).sum();
    assert_eq!(read(&store).unwrap(), all);
    assert_eq!(read(&store.clone()).unwrap(), 0);
    // The same bytes once more: nobody can know but by reading them.
    let norm = path.join("norm.safetensors");
    fs::write(&norm, fs::read(&norm).unwrap()).unwrap();
    assert_eq!(read(&store).unwrap(), fs::metadata(&norm).unwrap().len());
    let byte = fs::read(&norm).unwrap()[400];
    File::options().write(true).open(&norm).unwrap().write_all_at(&[!byte], 400).unwrap();
    assert_eq!(refused(&read(&store).unwrap_err()), "norm.safetensors");
}

#[test]
fn whoever_writes_to_a_shard_in_use_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy_of(original(), &path);
    let store = Store::open(&path).unwrap();
    let norm = store.final_norm().unwrap();
    let (file, name) = (norm.file(), path.join("norm.safetensors"));
    assert!(file.is_unchanged());

    // Replaced by renaming: the old bytes stay as they are, though somebody touched their file.
    let kept = dir.path().join("kept");
    fs::rename(&name, &kept).unwrap();
    fs::copy(&kept, &name).unwrap();
    assert!(!file.is_unchanged(), "the file has another name now");
    file.verify().unwrap();
    assert!(file.is_unchanged());

    // Written to and put back, its time as well: right at the end, yet not all the time.
    let writer = File::options().read(true).write(true).open(&kept).unwrap();
    let modified = writer.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    writer.read_exact_at(&mut byte, 300).unwrap();
    writer.write_all_at(&[!byte[0]], 300).unwrap();
    writer.write_all_at(&byte, 300).unwrap();
    writer.set_modified(modified).unwrap();
    assert!(!file.is_unchanged());
    file.verify().unwrap();

    // Another byte.
    let copy = file.copied().unwrap();
    writer.write_all_at(&[!byte[0]], 300).unwrap();
    writer.set_modified(modified).unwrap();
    assert!(!file.is_unchanged());
    assert_eq!(refused(&file.verify().unwrap_err()), "norm.safetensors");
    assert!(!file.is_unchanged(), "it does not become right by being looked at");
    assert!(copy.is_unchanged(), "nobody can change a copy");
    copy.verify().unwrap();
    assert!(file.copied().is_err(), "a copy is compared, too");
    writer.write_all_at(&byte, 300).unwrap();
    file.verify().unwrap();

    // Cut short inside its only page, where the kernel shows zeros and raises no signal.
    writer.set_len(100).unwrap();
    assert!(!file.is_unchanged());
    let text = file.verify().unwrap_err().to_string();
    assert!(text.contains("norm.safetensors has 100 bytes, the manifest says"), "{text}");
}

#[test]
fn files_are_compared_bit_by_bit_and_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy_of(original(), &path);
    let store = Store::open(&path).unwrap();
    let shard = store.layer(1).unwrap();
    let files = [store.final_norm().unwrap().file().clone(), shard.file().clone()];
    let mut watch = FileWatch::default();
    let mut round = |files: &[WeightFile]| {
        let (mut calls, mut ended) = (0, 0);
        while ended < files.len() {
            calls += 1;
            ended += usize::from(watch.compare(files, 1000)?);
        }
        Ok::<_, StoreError>(calls)
    };
    let calls = files.iter().map(|file| file.bytes().len().div_ceil(1000)).sum::<usize>();
    assert_eq!(round(&files).unwrap(), calls);
    assert_eq!(round(&files).unwrap(), calls, "it begins again");
    assert_eq!(round(&files[1..]).unwrap(), files[1].bytes().len().div_ceil(1000));
    assert_eq!(round(&[]).unwrap(), 0);
    let writer = File::options().write(true).open(shard.path()).unwrap();
    writer.write_all_at(&[!shard.bytes()[5000]], 5000).unwrap();
    assert_eq!(refused(&round(&files).unwrap_err()), "layer-0001.safetensors");
}

#[test]
fn a_worker_without_work_notices_who_writes_to_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy_of(original(), &path);
    let store = Store::open(&path).unwrap();
    let files = [store.final_norm().unwrap().file().clone()];
    let name = path.join("norm.safetensors");
    let mut watch = FileWatch::default();
    watch.look(&files).unwrap();
    let bytes = fs::read(&name).unwrap();
    let writer = File::options().write(true).open(&name).unwrap();
    writer.write_all_at(&bytes, 0).unwrap();
    watch.look(&files).unwrap();
    assert!(!files[0].is_unchanged(), "a step in progress may have read what was there in between");
    writer.write_all_at(&[!bytes[300]], 300).unwrap();
    assert_eq!(refused(&watch.look(&files).unwrap_err()), "norm.safetensors");
    writer.set_len(10).unwrap();
    assert_eq!(refused(&watch.look(&files).unwrap_err()), "norm.safetensors");
    watch.look(&[]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever few bits are flipped: refused, or of no consequence.
    #[test]
    fn flipped_bits_never_pass(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..4),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        copy_of(original(), &path);
        let mut names: Vec<PathBuf> =
            fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        for (file, bit) in flips {
            let name = &names[file.index(names.len())];
            let mut bytes = fs::read(name).unwrap();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(name, bytes).unwrap();
        }
        let opened = Store::open(&path);
        if let Ok(store) = opened
            && store.verify_files(|_| {}).is_ok()
        {
            let good = Store::open(original()).unwrap();
            prop_assert_eq!(store.manifest(), good.manifest());
            for layer in 0..2 {
                let (ours, theirs) = (store.layer(layer).unwrap(), good.layer(layer).unwrap());
                prop_assert_eq!(ours.bytes(), theirs.bytes());
            }
        }
    }
}

/// What a process that reads a file which is cut short under it says as its last.
#[test]
fn a_file_that_is_cut_short_ends_the_process_with_a_sentence() {
    const CHILD: &str = "TERCET_TEST_CUT_SHORT";
    #[expect(clippy::disallowed_methods, reason = "a test that runs itself once more")]
    if let Ok(path) = std::env::var(CHILD) {
        let store = Store::open(Path::new(&path)).unwrap();
        let shard = store.layer(0).unwrap();
        File::options().write(true).open(shard.path()).unwrap().set_len(4096).unwrap();
        let sum: u64 = shard.bytes().iter().map(|byte| u64::from(*byte)).sum();
        panic!("it read {sum}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy_of(original(), &path);
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "a_file_that_is_cut_short_ends_the_process_with_a_sentence",
            "--exact",
            "--nocapture",
        ])
        .env(CHILD, &path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr).into_owned();
    assert_eq!(child.status.code(), Some(1), "{said}");
    let shard = path.join("layer-0000.safetensors");
    let sentence = format!("error: the mapped file {} was cut short", shard.display());
    assert!(said.contains(&sentence), "{said}");
    assert!(!said.contains("it read"), "{said}");
}
