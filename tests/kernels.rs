//! The committed PTX: made from the sources that lie beside it, by the pinned compiler, with nothing of the machine in it.

#[path = "../build/nvcc.rs"]
#[allow(dead_code)] // the build script uses the rest
mod nvcc;
#[path = "../build/ptx.rs"]
#[allow(dead_code)] // the build script uses the rest
mod ptx;

use std::fs;
use std::path::Path;

use annulus::kernels;

#[test]
fn every_source_has_a_module_made_from_it() {
    let sources = ptx::sources(Path::new("kernels")).unwrap();
    assert!(!sources.is_empty());
    let names: Vec<_> = sources.iter().map(|source| source.file_stem().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, kernels::ALL.map(|(name, _)| name), "kernels/*.cu and kernels::ALL");
    for source in &sources {
        let committed = Path::new("kernels/ptx").join(ptx::file_name(source));
        let text = fs::read_to_string(&committed).unwrap();
        let digest = ptx::digest(source).unwrap();
        assert_eq!(ptx::digest_of(&text), Some(digest), "{}: rebuild with ANNULUS_UPDATE_PTX=1", committed.display());
    }
}

#[test]
fn the_program_holds_the_committed_text() {
    for (name, text) in kernels::ALL {
        assert_eq!(text, fs::read_to_string(format!("kernels/ptx/{name}.ptx")).unwrap(), "{name}");
        let expected = format!("nvcc {}, lowered to PTX ISA {}", nvcc::PINNED_VERSION, ptx::ISA_VERSION);
        assert_eq!(kernels::origin(text), expected, "{name}");
    }
}

#[test]
fn ptx_names_the_lowered_version_and_no_folder_of_a_machine() {
    for (name, text) in kernels::ALL {
        let starting = |directive| text.lines().filter(move |line| line.starts_with(directive));
        assert_eq!(starting(".version").collect::<Vec<_>>(), [format!(".version {}", ptx::ISA_VERSION)], "{name}");
        assert_eq!(starting(".target").collect::<Vec<_>>(), [".target sm_80"], "{name}");
        let hash = "_INTERNAL_00000000_";
        assert_eq!(text.matches("_INTERNAL_").count(), text.matches(hash).count(), "{name}: a name holds a hash");
        for file in starting(".file") {
            let path = file.split('"').nth(1).unwrap();
            assert!(!path.trim_start_matches("kernels/").contains('/'), "{name}: {file}");
        }
    }
}

#[test]
fn normalizing_keeps_the_code_and_drops_the_machine() {
    let text = "//\n// Compiler Build ID: CL-1\n\n.version 9.0\n.target sm_80\n.visible .entry k(\n)\n{\n\t.loc\t1 3 0\n\
        \t.shared .b8 _ZZN40_INTERNAL_462b1c02_7_norm_cu_742797163sumEvE4sums[8];\n\
        \t.loc\t2 9 3, function_name $L__info_string0, inlined_at 1 3 5\n\t.pragma \"used_bytes_mask 15\";\n\tret;\n\n}\n\
        \t.file\t1 \"/home/me/annulus/kernels/k.cu\"\n\t.file\t2 \"/opt/cuda/include/cuda_bf16.hpp\", 17, 4\n\
        \t.section\t.debug_str\n\t{\n$L__info_string0:\n.b8 95,0\n\n\t}\n";
    let expected = "// nvcc 13.0.88, lowered to PTX ISA 8.2; sources 0000000000000abc\n.version 8.2\n.target sm_80\n\
        .visible .entry k(\n)\n{\n\t.loc\t1 3 0\n\
        \t.shared .b8 _ZZN40_INTERNAL_00000000_7_norm_cu_000000003sumEvE4sums[8];\n\t.loc\t2 9 3\n\tret;\n}\n.file\t1 \"kernels/k.cu\"\n.file\t2 \"cuda_bf16.hpp\"\n";
    let normal = ptx::normalize(text, 0xabc).unwrap();
    assert!(normal.starts_with(expected), "{normal}");
    assert_eq!(ptx::digest_of(&normal), Some(0xabc));
    assert!(ptx::normalize(".version 8.7\n", 0).is_err());
}
