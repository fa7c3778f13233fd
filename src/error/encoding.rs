//! Decoders for `Content-Encoding`, with the feature `decompression`.

use http::{HeaderMap, header::CONTENT_ENCODING};
use zeroize::Zeroizing;

/// More encodings than this are not decoded.
const MAX_ENCODINGS: usize = 4;

/// Decodes up to `limit` bytes of a body by its `Content-Encoding`
/// ([RFC 9110 section 8.4](https://www.rfc-editor.org/rfc/rfc9110#section-8.4)). What can be decoded of a body that is
/// incomplete or broken counts.
///
/// `None` if there is nothing to decode, nothing could be, or an encoding is not known.
pub(crate) fn decoded(headers: &HeaderMap, body: &[u8], limit: usize) -> Option<Zeroizing<Vec<u8>>> {
    let values = headers.get_all(CONTENT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    let encodings: Vec<_> = values
        .flat_map(|value| value.split(','))
        .map(|encoding| encoding.trim().to_ascii_lowercase())
        .filter(|encoding| !matches!(&**encoding, "" | "identity"))
        .take(MAX_ENCODINGS + 1)
        .collect();
    if encodings.is_empty() || encodings.len() > MAX_ENCODINGS {
        return None;
    }
    decode(&encodings, body, limit).filter(|text| !text.is_empty())
}

#[cfg(not(feature = "decompression"))]
fn decode(_: &[String], _: &[u8], _: usize) -> Option<Zeroizing<Vec<u8>>> {
    None
}

#[cfg(feature = "decompression")]
fn decode(encodings: &[String], body: &[u8], limit: usize) -> Option<Zeroizing<Vec<u8>>> {
    use std::io::{BufRead, BufReader, Read};

    use brotli_decompressor::Decompressor;
    use flate2::bufread::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

    /// How much the result of one encoding may exceed the limit if it is in turn encoded.
    const MAX_RATIO: u64 = 8;
    const BUFFER: usize = 4096;

    let mut reader: Box<dyn Read + '_> = Box::new(body);
    // The last encoding was applied last.
    for encoding in encodings.iter().rev() {
        let mut encoded =
            BufReader::with_capacity(BUFFER, reader.take((limit as u64).saturating_mul(MAX_RATIO)));
        reader = match &**encoding {
            "gzip" | "x-gzip" => Box::new(MultiGzDecoder::new(encoded)),
            "br" => Box::new(Decompressor::new(encoded, BUFFER)),
            // Some servers leave out the zlib header, by which it is told
            // ([RFC 1950 section 2.2](https://www.rfc-editor.org/rfc/rfc1950#section-2.2)).
            "deflate" => match encoded.fill_buf().ok()? {
                [first, second, ..]
                    if first & 0xf == 8 && u16::from_be_bytes([*first, *second]) % 31 == 0 =>
                {
                    Box::new(ZlibDecoder::new(encoded))
                }
                _ => Box::new(DeflateDecoder::new(encoded)),
            },
            _ => return None,
        };
    }
    // Allocated at full size, because a growing buffer leaves unwiped copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(limit));
    // After an error, the text is what came before it.
    let _ = reader.take(limit as u64).read_to_end(&mut text);
    Some(text)
}

#[cfg(test)]
#[cfg(feature = "decompression")]
mod tests {
    use std::io::{Read, Write};

    use flate2::{
        Compression,
        read::{DeflateEncoder, GzEncoder, ZlibEncoder},
    };
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 64 * 1024;

    /// `Selam` in Brotli.
    const BROTLI: &[u8] = b"\x0b\x02\x80\x53\x65\x6c\x61\x6d\x03";

    fn read(mut reader: impl Read) -> Vec<u8> {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn encode(encoding: &str, text: &[u8]) -> Vec<u8> {
        match encoding {
            "gzip" => read(GzEncoder::new(text, Compression::default())),
            "zlib" => read(ZlibEncoder::new(text, Compression::default())),
            _ => read(DeflateEncoder::new(text, Compression::default())),
        }
    }

    fn decode(values: &[&str], body: &[u8]) -> Option<Vec<u8>> {
        let values = values.iter().map(|value| (CONTENT_ENCODING, value.parse().unwrap()));
        decoded(&HeaderMap::from_iter(values), body, LIMIT).map(|text| text.to_vec())
    }

    /// J11
    #[test]
    fn each_encoding_is_decoded() {
        let text = b"Selam".as_slice();
        let stacked = encode("gzip", &encode("zlib", text));
        for (values, body) in [
            (&["gzip"][..], encode("gzip", text)),
            (&["X-GZip"], encode("gzip", text)),
            (&["deflate"], encode("zlib", text)),
            (&["deflate"], encode("raw", text)),
            (&["br"], BROTLI.to_vec()),
            (&["identity, br", ""], BROTLI.to_vec()),
            (&["deflate, gzip"], stacked.clone()),
            (&["deflate", "gzip"], stacked),
            (&["br, gzip"], encode("gzip", BROTLI)),
        ] {
            assert_eq!(decode(values, &body).as_deref(), Some(text), "{values:?}");
        }
        for values in [&[][..], &["identity"], &["zstd"], &["gzip, zstd"], &["gzip,gzip,gzip,gzip,gzip"]] {
            assert_eq!(decode(values, &encode("gzip", text)), None, "{values:?}");
        }
    }

    /// J11, E4: a bomb is bounded, also one inside another.
    #[test]
    fn bombs_are_bounded() {
        let bomb = encode("gzip", &vec![0; 1 << 24]);
        assert_eq!(decode(&["gzip"], &bomb).unwrap().len(), LIMIT);
        assert_eq!(decode(&["gzip, gzip"], &encode("gzip", &bomb)).unwrap().len(), LIMIT);
    }

    /// J11, E4: what comes before the cut counts.
    #[test]
    fn truncated_bodies_are_decoded_in_part() {
        let text: Vec<u8> = (0..20_000_u32).flat_map(|number| number.to_be_bytes()).collect();
        for (value, encoding) in [("gzip", "gzip"), ("deflate", "zlib"), ("deflate", "raw")] {
            let encoded = encode(encoding, &text);
            let part = decode(&[value], &encoded[..encoded.len() / 2]).unwrap();
            assert!(part.len() > 1000 && text.starts_with(&part), "{encoding}: {}", part.len());
        }
        let part = decode(&["br"], &BROTLI[..BROTLI.len() - 1]).unwrap_or_default();
        assert!(b"Selam".starts_with(&part));
    }

    proptest! {
        /// E2: no bytes panic.
        #[test]
        fn decoding_never_panics(value in "(gzip|deflate|br|, ){1,3}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&[&value], &bytes);
            let mut gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\xff".to_vec();
            gzip.write_all(&bytes).unwrap();
            let _ = decode(&["gzip"], &gzip);
        }
    }
}
